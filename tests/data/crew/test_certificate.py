"""The certificate of a crew: only its owner can read it, and one is made however many come at once."""

import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509

from ditmoe.data.crew.certificate import CERTIFICATE, crew_security
from ditmoe.model.errors import UserError


def test_folder_and_key_are_the_owners_alone(tmp_path: Path) -> None:
    security = crew_security(tmp_path / "runs" / "crew")
    pem = tmp_path / "runs" / "crew" / CERTIFICATE
    assert stat.S_IMODE(pem.parent.stat().st_mode) == 0o700 and stat.S_IMODE(pem.stat().st_mode) == 0o600
    assert security.require_encryption and security.tls_ca_file == str(pem)
    before = pem.read_bytes()
    crew_security(pem.parent)
    assert pem.read_bytes() == before
    member, authority = x509.load_pem_x509_certificates(before)
    member.verify_directly_issued_by(authority)
    authority.verify_directly_issued_by(authority)
    assert before.count(b"PRIVATE KEY-----") == 2  # of the member, and not of the authority that could make more
    assert member.not_valid_before_utc < member.not_valid_after_utc


def test_many_at_once_make_one(tmp_path: Path) -> None:
    def come(_: int) -> bytes:
        crew_security(tmp_path / "crew")
        return (tmp_path / "crew" / CERTIFICATE).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(come, range(16)))) == 1
    assert [path.name for path in (tmp_path / "crew").iterdir()] == [CERTIFICATE]


def test_what_others_may_read_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "crew"
    folder.mkdir(mode=0o750)
    folder.chmod(0o750)
    with pytest.raises(UserError, match=r"crew: has mode 750, and who can read.*expected 700"):
        crew_security(folder)
    assert not list(folder.iterdir())
    folder.chmod(0o700)
    crew_security(folder)
    (folder / CERTIFICATE).chmod(0o640)
    with pytest.raises(UserError, match=r"crew\.pem: has mode 640.*expected 600"):
        crew_security(folder)
    (folder / CERTIFICATE).rename(tmp_path / "elsewhere.pem")
    (folder / CERTIFICATE).symlink_to(tmp_path / "elsewhere.pem")
    with pytest.raises(UserError, match=r"crew\.pem: expected a file of a crew's certificate, and no link"):
        crew_security(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="link: expected a folder of a crew's certificate, and no link"):
        crew_security(tmp_path / "link")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crew_security(tmp_path / "crew")
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(UserError, match="crew: is another user's; expected a folder of your own"):
        crew_security(tmp_path / "crew")


def test_openssl_holds_the_certificate_for_valid(tmp_path: Path) -> None:
    """With the strict rules that newer Pythons turn on."""
    crew_security(tmp_path / "crew")
    pem = tmp_path / "crew" / CERTIFICATE

    def context(purpose: ssl.Purpose) -> ssl.SSLContext:
        made = ssl.create_default_context(purpose, cafile=pem)
        made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        made.load_cert_chain(pem)
        return made

    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(ssl.Purpose.SERVER_AUTH).wrap_bio(back, there)
    server = context(ssl.Purpose.CLIENT_AUTH).wrap_bio(there, back, server_side=True)
    for end in (client, server) * 3:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    for end in (client, server):
        assert dict(fact[0] for fact in end.getpeercert()["subject"]) == {"commonName": "ditmoe crew"}
