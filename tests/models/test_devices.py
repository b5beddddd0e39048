"""devices.py: names that PyTorch reports, and what is known about them."""

import subprocess
import sys

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.models.devices import DEVICES, identify_device, parse_devices, peak_flops


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_a_device_is_known_by_the_name_that_pytorch_reports(reported: str, name: str):
    device = identify_device(reported)
    assert device is not None and device.name == name
    assert peak_flops(reported) == device.flops


@pytest.mark.parametrize(
    "reported",
    ["", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"],
)
def test_an_unknown_device_has_no_peak(reported: str):
    assert peak_flops(reported) is None


def test_names_differ_and_numbers_have_the_size_of_those_units():
    assert len({each.name.lower() for each in DEVICES}) == len(DEVICES)
    for each in DEVICES:
        assert 50e12 < each.flops < 5e15, each.name
        assert 20e9 < each.memory_bytes < 300e9, each.name
        assert 200e9 < each.bandwidth < 10e12, each.name


def test_the_table_and_the_formulas_import_without_torch():
    code = "import sys, optimer_hf.models.devices, optimer_hf.models.flops as f"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "number", "name"),
    [
        ("8xH100", 8, "H100"),
        ("H200", 1, "H200"),
        ("16 X a100-40gb", 16, "A100-40GB"),
        ("2xRTX-4090", 2, "RTX-4090"),
        (" 4*mi300x ", 4, "MI300X"),
    ],
)
def test_a_number_of_devices_is_read(text: str, number: int, name: str):
    n_devices, device = parse_devices(text)
    assert (n_devices, device.name) == (number, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH1000", r"found the device 'H1000'\. Did you mean 'H100'\?.*one of B300, "),
        ("8xTPU", r"found the device 'TPU'\. Expected"),
        ("", r"found the device ''"),
        ("x", r"found the device 'x'"),
        ("0xH100", r"found 0 devices, expected 1 to 100,000, as in 8xH100"),
        ("-8xH100", r"found -8 devices"),
        ("99999999999xH100", r"found 99999999999 devices"),
        ("8.5xH100", r"found the device '8.5xH100'"),
    ],
)
def test_other_devices_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_devices(text)
