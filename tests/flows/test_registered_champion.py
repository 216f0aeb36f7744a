"""Test the whole way of published weights on a stack: registered, served, reported, trained from by a round."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from safetensors.torch import load_file

from feedback.contracts import RoundParameters
from feedback.tables import new_id
from tests.flows.test_registration import FINETUNE_RECIPE
from tests.yuan.published import write_published_model
from yuan.config import ModelConfig

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
# The vocabulary of the demo's shape is not the published one, so the recipe takes the parent's shape.
RECIPE = FINETUNE_RECIPE.replace('preset = "mini"', 'preset = "parent"')
CONFIG = ModelConfig(name="t", num_layers=2, hidden_size=64, num_heads=4, vocab_size=320, seq_len=128)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published_model(tmp_path_factory.mktemp("weights") / "published", CONFIG)


@pytest.mark.slow
def test_registered_weights_are_served_and_a_round_trains_from_them(stack, operator, base_dataset, published, tmp_path):
    arguments = ("register", str(published), "--champion", "--licence", "Apache-2.0")
    registered = stack.cotrain(*arguments, check=True)[1]
    assert (registered["version"], registered["registered"], registered["champion"]) == (1, True, True)
    assert registered["smoke_test"]["answer"] is not None
    repeated = stack.cotrain(*arguments, check=True)[1]
    assert (repeated["version"], repeated["registered"]) == (1, False)
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1)
    assert operator.complete(["1+1="], max_tokens=4).model == "yuan-v1"
    assert operator.version(1).provenance.licence == "Apache-2.0" and operator.version(1).is_champion

    stack.cotrain("export", "champion", "--out", str(tmp_path / "out"), check=True)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(published / "model.safetensors").items():
        assert name.endswith("inv_freq") or (exported[name].dtype, exported[name].tolist()) == (
            tensor.dtype,
            tensor.tolist(),
        )

    recipes = stack.home / "recipes"
    recipes.mkdir(exist_ok=True)
    (recipes / "mine.toml").write_text(RECIPE)
    ended_round = stack.follow(operator, operator.start_round(RoundParameters(recipe="mine")))
    assert ended_round.state in ("promoted", "rejected"), ended_round.reason
    assert (ended_round.parent_version, ended_round.candidate_version) == (1, 2)
    lineage = operator.version(2)
    assert (lineage.parent, lineage.dtype, lineage.round, lineage.provenance) == ("v1", "bf16", 1, None)
    assert httpx.get(stack.settings.portal_url).status_code == 200

    other = write_published_model(tmp_path / "other", CONFIG, seed=5)
    status, output = stack.cotrain("register", str(other), "--champion")
    assert status == 1 and "is the champion; register without it" in output and "Traceback" not in output
    with ThreadPoolExecutor() as operators:
        outputs = list(operators.map(lambda _: stack.cotrain("register", str(other), check=True)[1], range(2)))
    assert sorted(output["registered"] for output in outputs) == [False, True]
    assert {output["version"] for output in outputs} == {3}
    status, output = stack.cotrain("register", str(stack.home / "runs" / lineage.run_id / "export"), "--champion")
    assert status == 1 and "leave out --champion" in output

    status, output = stack.cotrain("promote", "v99")
    assert status == 1 and "v99 was never registered here" in output
    status, output = stack.cotrain("promote", "champion")
    assert status == 0 and not output["promoted"] and output["version"] == operator.round("latest").candidate_version
    status, output = stack.cotrain("promote", "3")  # other random weights: the gate decides by the base rows
    if status == 0:
        assert output["promoted"] and output["previous"] != 3 and operator.version(3).is_champion
        stack.wait_until(lambda: stack.cotrain("export", "champion", "--out", str(tmp_path / new_id()))[0] == 0)
        assert not stack.cotrain("promote", "v3", check=True)[1]["promoted"]
    else:
        assert "v3 does not pass the gate" in output and "Traceback" not in output
