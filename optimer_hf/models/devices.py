"""What accelerators can do, from the data sheets of their makers.

Names come in, as PyTorch reports them or as people write them; peaks, memory and bandwidth go out.
"""

import re
from dataclasses import dataclass

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import did_you_mean

MOST_DEVICES = 100_000


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    `flops` is its peak in FLOP/s for products of dense bfloat16 matrices, summed in float32 (many
    data sheets print twice that, for sparse ones). Memory is in bytes and its bandwidth in bytes/s,
    in powers of ten as on the data sheet. `reported` matches `torch.cuda.get_device_name()`.
    """

    name: str
    reported: str
    flops: float
    memory_bytes: int
    bandwidth: float


def _device(
    name: str, reported: str, teraflops: float, gigabytes: int, gb_per_s: int
) -> Accelerator:
    return Accelerator(name, reported, teraflops * 1e12, gigabytes * 10**9, gb_per_s * 1e9)


DEVICES = (  # the first whose pattern matches counts
    # nvidia.com: data sheets of HGX B200 and B300, an eighth of the board each; of H200, H100, H20
    _device("B300", r"NVIDIA B300", 2250, 288, 8000),
    _device("B200", r"NVIDIA B200", 2250, 180, 8000),
    _device("GH200", r"NVIDIA GH200.*", 989, 96, 4000),
    _device("H200-NVL", r"NVIDIA H200 NVL", 835, 141, 4800),
    _device("H200", r"NVIDIA H200", 989, 141, 4800),
    _device("H100-NVL", r"NVIDIA H100 NVL", 835, 94, 3900),
    _device("H100-PCIe", r"NVIDIA H100 PCIe", 756, 80, 2000),
    _device("H100", r"NVIDIA H100( 80GB HBM3)?", 989, 80, 3350),
    _device("H20", r"NVIDIA H20", 148, 96, 4000),
    # data sheet "NVIDIA A100 Tensor Core GPU", of A40, A10, L4, L40S
    _device("A100-40GB", r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", 312, 40, 1555),
    _device("A100-PCIe", r"(NVIDIA )?A100[ -](PCIE-80GB|80GB PCIe)", 312, 80, 1935),
    _device("A100", r"(NVIDIA )?A100-SXM4-80GB", 312, 80, 2039),
    _device("A40", r"(NVIDIA )?A40", 149.7, 48, 696),
    _device("A10", r"(NVIDIA )?A10", 125, 24, 600),
    _device("A10G", r"(NVIDIA )?A10G", 70, 24, 600),
    _device("L40S", r"NVIDIA L40S", 362, 48, 864),
    _device("L4", r"NVIDIA L4", 121, 24, 300),
    # whitepapers "NVIDIA Ada GPU Architecture", "Ampere GA102", "RTX Blackwell", in the tables of
    # peak BF16 Tensor TFLOPS with FP32 accumulate
    _device("RTX-PRO-6000", r"NVIDIA RTX PRO 6000 Blackwell.*", 503.8, 96, 1792),
    _device("RTX-A6000", r"(NVIDIA )?RTX A6000", 154.8, 48, 768),
    _device("RTX-5090", r"NVIDIA GeForce RTX 5090", 209.5, 32, 1792),
    _device("RTX-4090", r"NVIDIA GeForce RTX 4090", 165.2, 24, 1008),
    _device("RTX-3090", r"NVIDIA GeForce RTX 3090", 71, 24, 936),
    # amd.com: data sheets "AMD Instinct"; one half of an MI250X is one device
    _device("MI355X", r"AMD Instinct MI355X.*", 2516, 288, 8000),
    _device("MI325X", r"AMD Instinct MI325X.*", 1307, 256, 6000),
    _device("MI300X", r"AMD Instinct MI300X.*", 1307, 192, 5300),
    _device("MI250X", r"AMD Instinct MI250X.*", 191.5, 64, 1638),
)


def identify_device(reported: str) -> Accelerator | None:
    """Return the device that PyTorch reports under a name, or None if it is not in the table.

    Parts of a device (MIG) and devices of laptops are not in it.
    """
    fitting = (each for each in DEVICES if re.fullmatch(each.reported, reported.strip()))
    return next(fitting, None)


def peak_flops(reported: str) -> float | None:
    """Return the peak in FLOP/s of dense bfloat16 products of a device that PyTorch reports under
    a name, or None if it is not in the table.
    """
    device = identify_device(reported)
    return None if device is None else device.flops


def parse_devices(text: str) -> tuple[int, Accelerator]:
    """Return the number and kind of the devices that a text such as `8xH100` or `H100` names.

    Raises ConfigError for a number out of range and for a device that is not in the table.
    """
    match = re.fullmatch(r"\s*(?:(-?[0-9]+)\s*[x*]\s*)?(\S.*?)\s*", text, re.IGNORECASE)
    number, name = match.groups() if match else (None, text)
    by_name = {each.name.lower(): each for each in DEVICES}
    names = [each.name for each in DEVICES]
    if name.lower() not in by_name:
        hint = did_you_mean(name.upper(), names)
        hint = hint if "mean" in hint else ""
        raise ConfigError(
            f"--on {text!r}: found the device {name!r}.{hint} Expected [N x] one of "
            f"{', '.join(names)}."
        )
    if number is not None and not (len(number) < 8 and 0 < int(number) <= MOST_DEVICES):
        raise ConfigError(
            f"--on {text!r}: found {number} devices, expected 1 to {MOST_DEVICES:,}, as in 8xH100."
        )
    return int(number or 1), by_name[name.lower()]
