import enum
import functools
import pkgutil


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    _hooks = {}  # noqa: RUF012
    _patched = set()  # noqa: RUF012

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
        assert hook_type is HookType.AROUND, "the stand-in has only what the adapter uses"
        cls._hooks.setdefault(target, []).append(hook)

    @classmethod
    def apply_hooks(cls):
        for target in sorted(set(cls._hooks) - cls._patched):
            cls._patched.add(target)
            scope, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(scope)
            for hook in cls._hooks[target]:
                setattr(owner, name, _around(getattr(owner, name), hook))


def _around(original, hook):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return hook(original, *args, **kwargs)

    return wrapper
