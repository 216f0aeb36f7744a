"""Helpers that serve a small model; `python -m tests.yuan.model_server PORT` runs the model server as a process."""

import sys

import torch
import uvicorn

from infra.http_server import make_server_options
from tests.serving import serve_app
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.model.transformer import Yuan
from yuan.serve.api import make_api
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import ServedModel
from yuan.serve.service import ModelService

WINDOW, TOKEN = 2048, "secret"


def make_served_model(version, window=WINDOW):
    tokenizer = tokenizers.train(["abcdefghij 0123456789 加减"], vocab_size=512)
    config = ModelConfig(
        name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=window
    )
    torch.manual_seed(version)
    model = Yuan(config).eval()
    for parameter in model.layers.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        model.embedding.weight[tokenizer.eod] = 0  # so that <eod> is rarely chosen
    return ServedModel(model, tokenizer, version)


@torch.inference_mode()
def assert_greedy(model, sequence):
    """Assert that each token of a sequence is the most likely one of a full pass, up to rounding."""
    ids = [*sequence.prompt, *sequence.tokens]
    logits = model(torch.tensor([ids]))[0, len(sequence.prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(dim=1), rtol=1e-4, atol=1e-4)


def serve_model(service):
    """Run the server in this process, on a free port; yield its URL."""
    return serve_app(make_api(TOKEN, service))


def read_metric(http, name):
    """Return the sum of a metric over its labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    torch.set_num_threads(1)
    uvicorn.run(
        make_api(TOKEN, service),
        port=int(sys.argv[1]),
        log_level="error",
        timeout_keep_alive=60,
        **make_server_options(),
    )
