"""Test MLflow's pages in a browser, signed in as a consumer."""

import shutil

import pytest

from tests.infra.mlflow import get_credentials

playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(stores, mlflow, browser):
    """Return a function that opens a path as the consumer in a fresh browser; fail on requests to other hosts."""
    name, password = get_credentials(stores)["consumer"]
    context = browser.new_context(http_credentials={"username": name, "password": password})
    context.set_default_timeout(120_000)
    page, foreign = context.new_page(), []

    def keep_foreign(route):
        if route.request.url.startswith((stores.mlflow_url, "data:", "blob:")):
            return route.continue_()
        foreign.append(route.request.url)
        route.abort()

    context.route("**/*", keep_foreign)

    def open_page(path):
        page.goto(stores.mlflow_url + path)
        return page

    yield open_page
    context.close()
    assert foreign == []


def test_root_url_shows_the_models_and_links_to_a_version(visit):
    page = visit("/")
    page.get_by_role("link", name="yuan", exact=True).first.click()
    page.get_by_role("link", name="Version 1").first.click()
    page.get_by_role("heading", name="Version 1").wait_for()
    assert page.url.endswith("/#/models/yuan/versions/1?workspace=default")
    assert page.get_by_text("Welcome to MLflow Assistant").count() == page.get_by_role("dialog").count() == 0


def test_deep_links_open_without_naming_the_workspace(visit, mlflow):
    run = f"/#/experiments/{mlflow.experiment}/runs/{mlflow.run}"
    shown = {
        "/#/models": "yuan",
        f"/#/models/yuan/versions/{mlflow.version}": "round-1",
        f"/#/experiments/{mlflow.experiment}": "round-1",
        run: "train/loss",
        f"{run}/model-metrics": "loss",
        f"{run}/artifacts": "config.json",
    }
    for path, text in shown.items():
        visit("/health")
        page = visit(path)
        if path.endswith("artifacts"):
            page.get_by_text("model", exact=True).first.click()
        page.get_by_text(text).first.wait_for()
        assert "workspace=default" in page.url
