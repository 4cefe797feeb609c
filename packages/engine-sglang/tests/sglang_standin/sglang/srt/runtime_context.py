import types


def get_schedule():
    return types.SimpleNamespace(max_prefill_tokens=64)


def max_prefill_buffer_tokens():
    return 0
