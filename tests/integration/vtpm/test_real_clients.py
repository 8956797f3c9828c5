"""tpm2-tools over the tcti of `vtpm show`, nothing of ours in between."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import Host

PCR = "16"


@pytest.fixture(scope="module")
def tcti() -> Iterator[str]:
    with Host() as host, host.client() as client:
        client.create("tools")
        host.cli("start", "tools", "--startup", "clear")
        yield client.show("tools").tcti


class Tools:
    """tpm2-tools in a folder of their own. No resource manager: transient objects are flushed by hand."""

    def __init__(self, tcti: str, folder: Path) -> None:
        self._tcti = tcti
        self._folder = folder

    def run(self, tool: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [f"tpm2_{tool}", "-T", self._tcti, *arguments],
            cwd=self._folder,
            input=stdin,
            capture_output=True,
            timeout=60,
        )

    def ok(self, tool: str, *arguments: str, stdin: bytes = b"") -> bytes:
        done = self.run(tool, *arguments, stdin=stdin)
        assert done.returncode == 0, f"{tool} {arguments}: {done.stderr.decode()}"
        self.run("flushcontext", "-t")
        return done.stdout


@pytest.fixture
def tools(tcti: str, tmp_path: Path) -> Tools:
    return Tools(tcti, tmp_path)


def test_nv_data_is_read_back_when_written(tools: Tools) -> None:
    tools.ok("nvdefine", "-Q", "-s", "32", "0x1500020")
    tools.ok("nvwrite", "-i", "-", "0x1500020", stdin=b"0123456789abcdef" * 2)
    assert tools.ok("nvread", "0x1500020") == b"0123456789abcdef" * 2


def test_quote_checks_out_and_no_other_does_when_a_pcr_was_extended(tools: Tools) -> None:
    tools.ok("createprimary", "-Q", "-C", "e", "-G", "ecc", "-c", "primary.ctx")
    tools.ok("create", "-Q", "-C", "primary.ctx", "-G", "ecc:ecdsa:null", "-u", "ak.pub", "-r", "ak.priv", "-a",
             "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign")  # fmt: skip
    tools.ok("load", "-Q", "-C", "primary.ctx", "-u", "ak.pub", "-r", "ak.priv", "-c", "ak.ctx")
    tools.ok("readpublic", "-Q", "-c", "ak.ctx", "-f", "pem", "-o", "ak.pem")
    tools.ok("pcrextend", f"{PCR}:sha256={'11' * 32}")
    quote = ("quote", "-Q", "-c", "ak.ctx", "-l", f"sha256:{PCR}", "-g", "sha256")
    tools.ok(*quote, "-q", "aabbcc", "-m", "quote", "-s", "signature", "-o", "pcrs")
    check = ("checkquote", "-u", "ak.pem", "-m", "quote", "-s", "signature", "-f", "pcrs", "-g", "sha256")
    subprocess.run([f"tpm2_{check[0]}", *check[1:], "-q", "aabbcc"], cwd=tools._folder, check=True, capture_output=True)
    other_nonce = subprocess.run(
        [f"tpm2_{check[0]}", *check[1:], "-q", "aabbcd"], cwd=tools._folder, capture_output=True
    )
    assert other_nonce.returncode != 0


def test_secret_is_unsealed_only_while_the_pcr_is_as_it_was(tools: Tools, tmp_path: Path) -> None:
    tools.ok("pcrreset", PCR)
    tools.ok("pcrextend", f"{PCR}:sha256={'22' * 32}")
    tools.ok("createpolicy", "-Q", "--policy-pcr", "-l", f"sha256:{PCR}", "-L", "policy")
    tools.ok("createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    (tmp_path / "secret").write_bytes(b"BitLocker's key")
    tools.ok("create", "-Q", "-C", "primary.ctx", "-u", "s.pub", "-r", "s.priv", "-L", "policy", "-i", "secret")
    tools.ok("load", "-Q", "-C", "primary.ctx", "-u", "s.pub", "-r", "s.priv", "-c", "s.ctx")
    assert tools.ok("unseal", "-c", "s.ctx", "-p", f"pcr:sha256:{PCR}") == b"BitLocker's key"
    tools.ok("pcrextend", f"{PCR}:sha256={'33' * 32}")
    refused = tools.run("unseal", "-c", "s.ctx", "-p", f"pcr:sha256:{PCR}")
    assert refused.returncode != 0
    assert b"BitLocker" not in refused.stdout


def test_keys_and_random_differ_when_made_in_two_vtpms(tcti: str, tmp_path: Path) -> None:
    with Host() as host, host.client() as client:
        client.create("other")
        host.cli("start", "other", "--startup", "clear")
        folders = (tmp_path / "a", tmp_path / "b")
        names = []
        for folder, each in zip(folders, (tcti, client.show("other").tcti), strict=True):
            folder.mkdir()
            tools = Tools(each, folder)
            tools.ok("createprimary", "-Q", "-C", "e", "-G", "ecc", "-c", "primary.ctx")
            tools.ok("readpublic", "-Q", "-c", "primary.ctx", "-n", "name")
            names.append((folder / "name").read_bytes() + tools.ok("getrandom", "32"))
        assert names[0][:34] != names[1][:34]
        assert names[0][34:] != names[1][34:]
