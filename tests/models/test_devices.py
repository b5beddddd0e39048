"""devices.py: names that PyTorch reports, and what is known about them."""

import subprocess
import sys

import pytest

from optimer_hf.models.devices import DEVICES, identify_device, peak_flops


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
