class ModelConfig:
    def get_hidden_size(self):
        return 32
