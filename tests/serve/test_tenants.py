"""Tenants: read from a closed file, told apart by hashed keys, held to their quotas."""

from __future__ import annotations

import hmac

import pytest

from discreet.config import DeidSection
from discreet.deid.operators import Operator
from discreet.deid.patterns import Label
from discreet.deid.policy import Channel, configured
from discreet.errors import AccessDenied, ConfigInvalid, Overloaded
from discreet.serve import asgi, tenants
from discreet.serve.answers import ToolArguments
from discreet.serve.tenants import Quotas, Tenant, identify, load

ONE, TWO = asgi.new_api_key(), asgi.new_api_key()
FILE = f"""
metrics_key_sha256 = "{"0" * 64}"
[tenant.ward]
key_sha256 = ["{ONE[1]}"]
keep = ["ORG"]
operators = {{ EMAIL = "label", DATE = "shift" }}
tool_arguments = "placeholder"
[tenant.lab]
key_sha256 = ["{TWO[1]}"]
requests_per_minute = 2
models = ["m"]
"""


@pytest.fixture
def both(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    found = load(path)
    assert found.metrics_key_hash == "0" * 64
    return found.tenants


def test_a_file_gives_each_tenant_its_policy_quota_and_models(both):
    ward, lab = both
    assert (ward.policy.operators[Label.ORG], ward.policy.operators[Label.PERSON]) == (Operator.KEEP, Operator.VAULT)
    assert [ward.policy.operators[label] for label in (Label.EMAIL, Label.DATE)] == [Operator.LABEL, Operator.SHIFT]
    assert ward.policy.digest != lab.policy.digest
    assert (ward.tools, lab.models, lab.requests_per_minute) == (ToolArguments.PLACEHOLDER, frozenset(("m",)), 2)


def test_a_project_says_what_its_tenants_begin_with(tmp_path):
    project = configured(DeidSection(operators={"prompt": {"any": {"SSN": "redact", "EMAIL": "label"}}}, names="rules"), Channel.PROMPT)
    (tmp_path / "tenants.toml").write_text(FILE.replace("EMAIL", "PHONE"))
    ward, lab = load(tmp_path / "tenants.toml", policy=project).tenants
    assert lab.policy == project
    assert [ward.policy.operators[label] for label in (Label.SSN, Label.EMAIL, Label.PHONE)] == [Operator.REDACT, Operator.LABEL, Operator.LABEL]
    assert ward.policy.names is project.names


def test_keys_are_read_from_either_header_and_compared_in_constant_time(both, monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(tenants.hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    assert identify(both, {"authorization": f"Bearer {ONE[0]}"}).name == "ward"
    assert identify(both, {"x-api-key": TWO[0]}).name == "lab"
    assert len(compared) == 4  # to the end, wherever the key is
    for headers in ({}, {"authorization": f"Basic {ONE[0]}"}, {"authorization": "Bearer "}, {"x-api-key": ONE[1]}):
        with pytest.raises(AccessDenied):
            identify(both, headers)
    assert ONE[1] not in repr(both)


def test_quotas(both, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tenants.time, "monotonic", lambda: now[0])
    quotas, (ward, lab) = Quotas(), both
    for _ in range(2):
        with quotas.admitted(lab):
            assert quotas.running() == 1
    with pytest.raises(Overloaded), quotas.admitted(lab):
        pass
    with quotas.admitted(ward):
        pass
    now[0] += 30
    with quotas.admitted(lab):
        pass
    assert quotas.running() == 0
    single = Tenant(name="x", key_hashes=(), max_concurrent=1)
    with quotas.admitted(single), pytest.raises(Overloaded), quotas.admitted(single):
        pass


@pytest.mark.parametrize(
    "text",
    ["", "[tenant.a]", "not toml", FILE + "surprise = 1", FILE.replace("ORG", "NOTHING"), FILE.replace("shift", "dance"), FILE.replace("DATE", "ORG"), FILE.replace(ONE[1], "short"), FILE.replace(TWO[1], ONE[1]), FILE.replace("ward", "'Ann Lee'"), FILE.replace("= 2", "= 0")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid):
        load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigInvalid):
        load(tmp_path / "none.toml")
