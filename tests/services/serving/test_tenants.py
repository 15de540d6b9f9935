"""The tenants' file, and limits by the minute."""

from __future__ import annotations

import os
import re

import pytest

from segcore.errors import Busy, ConfigError, Unauthenticated
from services.serving import tenants
from services.serving.tenants import OPEN, Quotas, Tenant, Tenants, new_token, token_hash

A, B = token_hash("a"), token_hash("b")


def write(path, text):
    path.write_text(text)
    return path


BAD_FILES = {
    "no tenant": ("tenants: []", ":1: tenants"),
    "a token instead of its hash": ("tenants:\n - {name: x, tokens: [secret]}", ":2: tenants.0.tokens"),
    "no token": ("tenants:\n - {name: x}", "needs a name and a token"),
    "no name": (f"tenants:\n - {{name: '', tokens: [{A}]}}", "needs a name and a token"),
    "a name that isn't one": (f"tenants:\n - {{name: x/y, tokens: [{A}]}}", ":2: tenants.0.name"),
    "the same name": (f"tenants:\n - {{name: x, tokens: [{A}]}}\n - {{name: x, tokens: [{B}]}}", "same name"),
    "the same token": (f"tenants:\n - {{name: x, tokens: [{A}]}}\n - {{name: y, tokens: [{A}]}}", "same token"),
    "no such limit": (f"tenants:\n - {{name: x, tokens: [{A}], gold: 1}}", "gold: there is no such key"),
    "a limit of nothing": (f"tenants:\n - {{name: x, tokens: [{A}], sessions: 0}}", "sessions"),
    "not YAML": ("tenants: [", ":1:"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_and_no_token_is_told(tmp_path, case):
    text, message = BAD_FILES[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Tenants(write(tmp_path / "tenants.yaml", text))
    assert A not in caught.value.message
    assert "secret" not in caught.value.message


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        Tenants(tmp_path / "absent.yaml")


def test_without_a_file_everybody_is_the_open_tenant():
    assert Tenants(None).authenticate(None) is Tenants(None).authenticate("Bearer x") is OPEN


def test_tokens_are_renewed_while_the_service_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tenants, "_REREAD_SECONDS", 0)
    file = write(tmp_path / "tenants.yaml", f"tenants:\n - {{name: x, tokens: [{A}]}}")
    known = Tenants(file)
    assert known.authenticate("Bearer a").name == "x"
    write(file, f"tenants:\n - {{name: x, tokens: [{B}]}}")
    os.utime(file, (1, 1))
    assert known.authenticate("bearer b").name == "x"
    with pytest.raises(Unauthenticated):
        known.authenticate("Bearer a")
    write(file, "damaged")
    os.utime(file, (2, 2))
    assert known.authenticate("Bearer b").name == "x"
    file.unlink()
    assert known.authenticate("Bearer b").name == "x"


def test_every_hash_is_compared(tmp_path, monkeypatch):
    text = f"tenants:\n - {{name: x, tokens: [{A}]}}\n - {{name: y, tokens: [{B}]}}"
    known, compared = Tenants(write(tmp_path / "tenants.yaml", text)), []
    monkeypatch.setattr(tenants.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    assert known.authenticate("Bearer a").name == "x"
    assert compared == [A, B]


def test_new_tokens_are_long_and_differ():
    assert new_token() != new_token()
    assert len(new_token()) >= 43


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_minutes_worth_may_be_used_at_once_and_comes_back_evenly():
    clock, tenant = Clock(), Tenant(name="x", requests_per_minute=60)
    quotas = Quotas(clock=clock)
    for _ in range(60):
        quotas.take(tenant, "requests")
    with pytest.raises(Busy, match="60 requests a minute") as caught:
        quotas.take(tenant, "requests")
    assert float(caught.value.details["retry_after_s"]) <= 0.01
    clock.now = 10
    for _ in range(10):
        quotas.take(tenant, "requests")
    with pytest.raises(Busy):
        quotas.take(tenant, "requests")
    clock.now = 1e6  # nothing beyond a minute's worth is saved
    for _ in range(60):
        quotas.take(tenant, "requests")
    with pytest.raises(Busy):
        quotas.take(tenant, "requests")


def test_what_was_used_beyond_a_limit_is_made_up_for():
    clock, tenant = Clock(), Tenant(name="x", tokens_per_minute=60)
    quotas = Quotas(clock=clock)
    quotas.take(tenant, "tokens", 0)
    quotas.charge(tenant, "tokens", 90)
    with pytest.raises(Busy) as caught:
        quotas.take(tenant, "tokens", 0)
    assert 30 <= float(caught.value.details["retry_after_s"]) <= 30.01
    clock.now = 30.01
    quotas.take(tenant, "tokens", 0)


def test_fronts_share_a_limit_tenants_do_not():
    quotas = Quotas(fronts=2, clock=Clock())
    for name in ("x", "y"):
        tenant = Tenant(name=name, requests_per_minute=4)
        quotas.take(tenant, "requests")
        quotas.take(tenant, "requests")
        with pytest.raises(Busy):
            quotas.take(tenant, "requests")


def test_without_a_limit_anything_goes():
    quotas = Quotas(clock=Clock())
    for kind in ("requests", "bytes", "tokens"):
        quotas.take(OPEN, kind, 10**12)
        quotas.charge(OPEN, kind, 10**12)
        quotas.take(OPEN, kind, 10**12)
