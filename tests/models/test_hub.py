"""Names on the hub: looked up in seconds before long work, and what is said of those that are none."""

import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers.hub_server import Repo, serve
from limbeck.core.errors import LimbeckError
from limbeck.models import hub

NOBODY = "http://127.0.0.1:9"  # a port where nothing listens


@pytest.fixture
def online(monkeypatch, tmp_path):
    """As if the tests were not offline, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_cached_only", {})
    return tmp_path / "hub"


def test_a_name_on_the_hub_and_one_that_is_not(online, monkeypatch):
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        server.repos["ann/student"] = Repo()
        assert not hub.check_hub_model("ann/student")
        with pytest.raises(LimbeckError, match="the hub has no model 'ann/studnet'"):
            hub.check_hub_model("ann/studnet")
        server.fail["model"] = 500  # an ailing hub: the loading itself tries again
        assert not hub.check_hub_model("ann/other")
    with pytest.raises(LimbeckError, match="neither a folder nor a name on the hub"):
        hub.check_hub_model("ann/my/student")


def test_a_revision_that_there_is_not(online, monkeypatch):
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        server.repos["ann/student"] = Repo(states={"v1": ("1" * 40, {})})
        hub.check_hub_model("ann/student@v1")
        with pytest.raises(LimbeckError, match="'ann/student' has no revision 'v2'") as error:
            hub.check_hub_model("ann/student@v2")
        assert error.value.hint.startswith("ann/student ")
        with pytest.raises(LimbeckError, match="the hub has no model 'ann/studnet'"):
            hub.check_hub_model("ann/studnet@v1")


def test_without_a_network(online, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    began = time.monotonic()
    with pytest.raises(LimbeckError, match="the hub cannot be reached to look for a model"):
        hub.check_hub_model("nothing")
    assert time.monotonic() - began < 3


def test_without_a_network_the_cache_serves(online, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: "/cache/config.json")
    assert hub.check_hub_model("ann/student"), "the loading is to look nowhere else"
    assert not constants.HF_HUB_OFFLINE, "other names are still looked up"
    monkeypatch.setattr(constants, "ENDPOINT", "no address at all")
    assert hub.check_hub_model("ann/student"), "the hub is asked once"


def test_offline_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    hub.check_hub_model("nothing")
