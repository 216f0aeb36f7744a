"""Ask the champion a report's question again, over HTTP."""

from collections.abc import Sequence

import httpx

from infra.settings import ModelServerAccess

BATCH = 64
MAX_TOKENS = 64


def ask_again(settings: ModelServerAccess, prompts: Sequence[str], version: int) -> list[str]:
    """Answers of the version in service to each prompt, without chance.

    Raises:
        httpx.HTTPError: if the model server does not answer; try again.
        ConnectionError: if another version is in service for the moment; try again.
    """
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    answers: list[str] = []
    with httpx.Client(base_url=settings.model_server_url, timeout=120, headers=headers) as http:
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            body = {"model": "yuan", "prompt": batch, "max_tokens": MAX_TOKENS, "temperature": 0}
            reply = http.post("/v1/completions", json=body).raise_for_status().json()
            if reply["model"] != f"yuan-v{version}":
                raise ConnectionError(f"v{version} was to be asked and {reply['model']} answered; try again")
            answers += [choice["text"] for choice in reply["choices"]]
    return answers
