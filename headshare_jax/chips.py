"""Published rates of chips, to plan for and to measure against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Published rates of a chip (docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e).

    Attributes:
      name: as a topology's name begins.
      hbm_bytes: main memory that a program can use, as XLA's compiler for the chip says: a little less than 16, 95 (XLA
        counts 96) and 32 GiB.
      flops: bfloat16 operations a second.
      hbm_bandwidth: bytes a second.
      network_bandwidth: bytes a second that a chip sends to its neighbours over all its links: half of the published
        bidirectional bandwidth.
      most_chips: in one pod.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    network_bandwidth: float
    most_chips: int


CHIPS = {
    "v5e": Chip("v5e", int(15.75 * 2**30), 197e12, 819e9, 200e9, 256),
    "v5p": Chip("v5p", int(95.73 * 2**30), 459e12, 2765e9, 600e9, 8960),
    "v6e": Chip("v6e", int(31.24 * 2**30), 918e12, 1640e9, 400e9, 256),
}

# Dense bfloat16 operations a second of a device as JAX names its kind; of GPUs, of the SXM form.
_FLOPS_OF_KIND = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def published_flops(kind: str) -> float | None:
    """A device's published bfloat16 operations a second, by its kind as JAX names it; None where it is not known."""
    # GPUs' names go on with their form and memory, as in "NVIDIA H100 80GB HBM3".
    if kind.startswith("NVIDIA "):
        kind = " ".join(kind.replace("-", " ").split()[:2])
    return _FLOPS_OF_KIND.get(kind)
