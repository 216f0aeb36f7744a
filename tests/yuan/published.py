"""Read a folder of weights in the published layout."""

from safetensors.torch import load_file


def load_hf_tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
