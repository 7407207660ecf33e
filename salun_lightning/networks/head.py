"""The layer of a classifier that makes logits."""

from torch import nn

from salun_lightning.weights import plain_name


def head_of(network: nn.Module) -> tuple[str, nn.Linear]:
    """The classification head: the last linear layer, by the order in which the parts of a network were made.

    Args:
        network: A classifier.

    Returns:
        Its plain name, and the layer.

    Raises:
        ValueError: There is no linear layer.

    Example:
        >>> head_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        ('2', Linear(in_features=8, out_features=2, bias=True))
    """
    layers = [(plain_name(name), layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{type(network).__name__} has no linear layer, so it is not known where its logits are made. Choose a method that"
            " needs no classification head."
        )
    return layers[-1]
