"""Classes of Lightning, which comes under two names."""


def is_a(instance: object, *classes: type) -> bool:
    """Whether something is of one of these classes of Lightning, under either of its names.

    ``lightning.pytorch`` and ``pytorch_lightning`` are one source, but their classes do not know each other.

    Args:
        instance: Anything.
        *classes: Classes of ``lightning.pytorch`` or ``lightning.fabric``.
    """
    wanted = {_place(kind) for kind in classes}
    return any(_place(base) in wanted for base in instance.__class__.__mro__)


def _place(kind: type) -> tuple[str, str]:
    module = f"{kind.__module__}."
    for name, other in (("lightning.pytorch.", "pytorch_lightning."), ("lightning.fabric.", "lightning_fabric.")):
        module = module.replace(name, other) if module.startswith(name) else module
    return module, kind.__qualname__
