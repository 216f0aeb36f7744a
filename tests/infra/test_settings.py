"""Test that each process's settings have the fields it uses, and no other secret."""

import pytest

from flows.stack.stack_config import load_or_make_config, write_environment
from infra.settings import (
    DispatcherSettings,
    FlowSettings,
    ModelServerSettings,
    PortalSettings,
    Settings,
    WorkerSettings,
    read_settings,
)

# Secrets of stack-config.json that a process may know.
ALLOWED = {
    PortalSettings: {"database", "s3_access_key", "s3_secret_key", "model_server"},
    ModelServerSettings: {"mlflow_reader", "model_server"},
    DispatcherSettings: {"database", "s3_access_key", "s3_secret_key", "mlflow", "prefect", "model_server"},
    WorkerSettings: {"prefect"},
    FlowSettings: {"database", "s3_access_key", "s3_secret_key", "mlflow", "prefect", "model_server", "split_salt"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_environment(home, load_or_make_config(home))
    return home


@pytest.mark.parametrize("kind", ALLOWED)
def test_process_gets_only_the_secrets_it_uses(home, kind):
    text = (home / kind.files[0]).read_text()
    secret_names = {name for name, secret in load_or_make_config(home).secrets.items() if secret in text}
    assert secret_names == ALLOWED[kind]
    assert (home / kind.files[0]).stat().st_mode & 0o777 == 0o600


def test_the_model_servers_account_only_reads(home, monkeypatch):
    monkeypatch.setenv("COTRAIN_HOME", str(home))
    settings = ModelServerSettings(_env_file=home / ModelServerSettings.files[0])
    assert settings.mlflow_username == "cotrain-reader"
    assert settings.mlflow_password.get_secret_value() == load_or_make_config(home).secrets["mlflow_reader"]


def test_values_with_quotes_and_spaces_survive_a_round_trip(home, monkeypatch):
    (home / "env.local").write_text("COTRAIN_TEAM=\"a 'quoted' \\\\ team # 1\"\n")
    write_environment(home, load_or_make_config(home))
    assert FlowSettings(_env_file=home / FlowSettings.files[0]).team == "a 'quoted' \\ team # 1"


def test_invalid_setting_is_reported_with_its_file_and_line(home):
    file = home / "env.local"
    file.write_text("COTRAIN_HELD_OUT_SHARE=2\n")
    with pytest.raises(
        ValueError,
        match=f"^COTRAIN_HELD_OUT_SHARE must be less than 1, got '2' .{file}, line 1.; correct the value there$",
    ):
        write_environment(home, load_or_make_config(home))


def test_missing_setting_is_reported_with_its_fix(tmp_path):
    with pytest.raises(ValueError, match=r"COTRAIN_PREFECT_AUTH.* run `cotrain up`"):
        read_settings(WorkerSettings, tmp_path)


def test_a_file_does_not_move_the_home_folder(tmp_path):
    (tmp_path / "env.local").write_text("COTRAIN_HOME=elsewhere\n")
    write_environment(tmp_path, load_or_make_config(tmp_path))
    assert read_settings(Settings, tmp_path).home == tmp_path
