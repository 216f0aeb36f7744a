"""Test the list of this machine's GPUs."""

from infra.gpus import list_gpu_models

INFORMATION = "Model: \t\t {model}\nIRQ:   \t\t 42\nGPU UUID: \t GPU-0\nBus Type: \t PCIe\n"


def test_gpus_are_listed_by_their_bus_address(tmp_path):
    for address, model in {"0000:b1:00.0": "NVIDIA L40S", "0000:3b:00.0": "NVIDIA H100 80GB HBM3"}.items():
        folder = tmp_path / "gpus" / address
        folder.mkdir(parents=True)
        (folder / "information").write_text(INFORMATION.format(model=model))
    assert list_gpu_models(tmp_path) == ["NVIDIA H100 80GB HBM3", "NVIDIA L40S"]


def test_machine_without_a_driver_has_no_gpus(tmp_path):
    assert list_gpu_models(tmp_path / "missing") == []
