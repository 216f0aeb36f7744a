"""Define the MLflow server's allow-lists: the routes that each kind of caller may use; all others are closed."""

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class RouteRule:
    """Allow one method on one path pattern; `*` matches one segment and `**` one or more."""

    method: str
    path: str

    def matches(self, method: str, path: str) -> bool:
        return method == self.method and _compile_path_pattern(self.path).fullmatch(path) is not None


@functools.cache
def _compile_path_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*\*", "[^/]+(?:/[^/]+)*").replace(r"\*", "[^/]+"))


def is_route_allowed(rules: Iterable[RouteRule], method: str, path: str) -> bool:
    """Return True if a request is on a list; HEAD counts as GET.

    >>> is_route_allowed(PUBLIC_RULES, "HEAD", "/health"), is_route_allowed(PUBLIC_RULES, "GET", "/health/")
    (True, False)
    """
    method = "GET" if method == "HEAD" else method
    return any(rule.matches(method, path) for rule in rules)


def parse_rules(text: str) -> tuple[RouteRule, ...]:
    """Parse rules, one per line; `{a,b}` expands to each member, so `{,ajax-}api` means both of MLflow's prefixes.

    >>> parse_rules("GET /{a,b}/*")
    (RouteRule(method='GET', path='/a/*'), RouteRule(method='GET', path='/b/*'))
    """
    rules = []
    for line in text.strip().splitlines():
        method, pattern = line.split()
        # Text outside braces is a list of one alternative.
        alternatives = [part.split(",") for part in re.split(r"[{}]", pattern)]
        rules += [RouteRule(method, "".join(choice)) for choice in itertools.product(*alternatives)]
    return tuple(rules)


CONSUMER_ACCOUNT = "consumer"  # the read-only account that consumers of the model share
READER_ACCOUNT = "cotrain-reader"  # the platform's read-only account, for the model server
# Parameters of the URL of an upload. On `mpu/create`: sign addresses for this upload, from this part on, and create
# none. On `artifacts`: the body is this part of this upload, and not a whole file.
UPLOAD_PARAMETER = "upload_id"
PART_PARAMETER = "part_number"

# Without sign-in: routes for probes and the sign-in page.
PUBLIC_RULES = parse_rules("""
GET /health
GET /static-files/**
GET /{,ajax-}api/3.0/mlflow/server-info
""")

# For every account: read experiments, runs, versions, aliases and artifacts, with the client library and in the pages.
# MLflow itself still checks which of them the account may read.
CONSUMER_RULES = parse_rules("""
GET /
GET /{,ajax-}api/2.0/mlflow/experiments/{get,get-by-name,search}
POST /{,ajax-}api/2.0/mlflow/experiments/search
POST /ajax-api/2.0/mlflow/experiments/search-datasets
GET /{,ajax-}api/2.0/mlflow/runs/get
POST /{,ajax-}api/2.0/mlflow/runs/search
GET /{,ajax-}api/2.0/mlflow/metrics/{get-history,get-history-bulk-interval}
GET /ajax-api/2.0/mlflow/metrics/get-history-bulk
GET /{,ajax-}api/2.0/mlflow/registered-models/{get,search,alias,get-latest-versions}
POST /{,ajax-}api/2.0/mlflow/registered-models/get-latest-versions
GET /{,ajax-}api/2.0/mlflow/model-versions/{get,search,get-download-uri}
GET /{,ajax-}api/2.0/mlflow/logged-models/*
GET /{,ajax-}api/2.0/mlflow/logged-models/*/artifacts/directories
GET /ajax-api/2.0/mlflow/logged-models/*/artifacts/files
POST /{,ajax-}api/2.0/mlflow/logged-models/search
GET /{,ajax-}api/2.0/mlflow/artifacts/list
POST /{,ajax-}api/2.0/mlflow/artifacts/presigned-download-url
GET /{,ajax-}api/2.0/mlflow-artifacts/artifacts
GET /{,ajax-}api/2.0/mlflow-artifacts/{artifacts,presigned}/**
GET /{get-artifact,model-versions/get-artifact}
POST /graphql
GET /{,ajax-}api/3.0/mlflow/workspaces
GET /{,ajax-}api/3.0/mlflow/workspaces/*
GET /{,ajax-}api/2.0/mlflow/users/current
GET /{,ajax-}api/3.0/mlflow/users/current/permissions
""")

# Bodies of these requests are files of any size; they are streamed without checks.
UPLOAD_RULES = parse_rules("PUT /{,ajax-}api/2.0/mlflow-artifacts/artifacts/**")

# For the platform's tracker and an operator's browser. Nobody may rename or delete a registered model, create another
# administrator or workspace, or use routes that run code or call other hosts: assistant, gateway, jobs, scorers,
# webhooks.
ADMINISTRATOR_RULES = CONSUMER_RULES + parse_rules("""
POST /{,ajax-}api/2.0/mlflow/experiments/{create,update,delete,restore,set-experiment-tag,delete-experiment-tag}
POST /{,ajax-}api/2.0/mlflow/runs/{create,update,delete,restore,set-tag,delete-tag}
POST /{,ajax-}api/2.0/mlflow/runs/{log-batch,log-metric,log-parameter,log-inputs,log-model,outputs}
POST /{,ajax-}api/2.0/mlflow/logged-models
DELETE /{,ajax-}api/2.0/mlflow/logged-models/*
PATCH /{,ajax-}api/2.0/mlflow/logged-models/*
POST /{,ajax-}api/2.0/mlflow/logged-models/*/params
PATCH /{,ajax-}api/2.0/mlflow/logged-models/*/tags
DELETE /{,ajax-}api/2.0/mlflow/logged-models/*/tags/*
POST /{,ajax-}api/2.0/mlflow/registered-models/{create,set-tag,alias}
PATCH /{,ajax-}api/2.0/mlflow/registered-models/update
DELETE /{,ajax-}api/2.0/mlflow/registered-models/{delete-tag,alias}
POST /{,ajax-}api/2.0/mlflow/model-versions/{create,set-tag}
PATCH /{,ajax-}api/2.0/mlflow/model-versions/update
DELETE /{,ajax-}api/2.0/mlflow/model-versions/{delete,delete-tag}
PUT /{,ajax-}api/2.0/mlflow-artifacts/artifacts/**
DELETE /{,ajax-}api/2.0/mlflow-artifacts/artifacts/**
POST /{,ajax-}api/2.0/mlflow-artifacts/mpu/{create,complete,abort}/**
GET /{,ajax-}api/2.0/mlflow/users/{get,list}
POST /{,ajax-}api/2.0/mlflow/users/create
PATCH /{,ajax-}api/2.0/mlflow/users/update-password
DELETE /{,ajax-}api/2.0/mlflow/users/delete
GET /{,ajax-}api/3.0/mlflow/users/{permissions/get,permissions/list,roles/list}
POST /{,ajax-}api/3.0/mlflow/users/permissions/{grant,revoke}
GET /{,ajax-}api/3.0/mlflow/roles/{get,list,permissions/list,users/list}
POST /{,ajax-}api/3.0/mlflow/roles/{create,assign,permissions/add}
PATCH /{,ajax-}api/3.0/mlflow/roles/{update,permissions/update}
DELETE /{,ajax-}api/3.0/mlflow/roles/{delete,unassign,permissions/remove}
""")
