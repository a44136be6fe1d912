"""FedPEFT: federated parameter-efficient fine-tuning of foundation models, the library without a network."""

from importlib.metadata import version

__version__ = version("fedpeft")
PROTOCOL = 1
"""Version of the wire protocol in `protos/fedpeft/v1`."""
