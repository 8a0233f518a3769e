"""Who belongs to a crew: whoever can read the folder in which its certificate lies.

Processes of a crew send each other pickles, so whoever can connect can run programs as the user. So every
connection is TLS in which both sides prove that they have the key of the crew, and the key is a file that only its
owner can read, in a folder that only its owner can enter. The authority that signed the certificate signed nothing
else, and its own key was never written down.
"""

import datetime
import os
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from distributed.security import Security

from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.model.errors import UserError

CERTIFICATE: Final = "crew.pem"
_YEARS: Final = 10
_WAIT_SECONDS: Final = 0.1


def crew_security(folder: Path) -> Security:
    """What the processes of a crew know each other by; it is made where the folder has none.

    Args:
        folder: of the crew, made where it is not there, for its owner alone.

    Raises:
        UserError: somebody else may read the folder or the file, or they are another user's.
    """
    if not os.path.lexists(folder):
        make_folder(folder.parent)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: could not be made: {error.strerror or error}") from error
    _check_private(folder, stat.S_ISDIR, "folder")
    path = folder / CERTIFICATE
    claims = Claims(folder)
    while not os.path.lexists(path):
        with claims.taken("certificate") as claim:
            if claim is not None and not os.path.lexists(path):
                with replacing(path, private=True) as file:
                    file.write(_new_certificate())
                break
        time.sleep(_WAIT_SECONDS)
    _check_private(path, stat.S_ISREG, "file")
    where = str(path.absolute())
    roles = {f"tls_{role}_{part}": where for role in ("client", "scheduler", "worker") for part in ("cert", "key")}
    return Security(require_encryption=True, tls_ca_file=where, tls_min_version=ssl.TLSVersion.TLSv1_3, **roles)


def _check_private(path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    """UserError where a link stands there, or others than this user may read or change it."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    if not is_kind(found.st_mode):
        raise UserError(f"{path}: expected a {kind} of a crew's certificate, and no link")
    if found.st_uid != os.geteuid():
        raise UserError(f"{path}: is another user's; expected a {kind} of your own")
    if found.st_mode & 0o077:
        mode = "700" if kind == "folder" else "600"
        raise UserError(
            f"{path}: has mode {stat.S_IMODE(found.st_mode):o}, and who can read the key of a crew can run "
            f"programs as you; expected {mode}: choose a new folder, or delete what others could read and "
            f"`chmod {mode}` it"
        )


def _new_certificate() -> bytes:
    """The authority's certificate, then one for every process, with its key: PEM."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ditmoe crew authority")])
    member = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ditmoe crew")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    own = _unsigned(authority, authority, authority_key.public_key())
    own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    own = own.add_extension(identifier, critical=False)
    own = own.add_extension(_usage(signs=True), critical=True)
    theirs = _unsigned(member, authority, key.public_key())
    theirs = theirs.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    theirs = theirs.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    theirs = theirs.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    theirs = theirs.add_extension(_usage(signs=False), critical=True)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    theirs = theirs.add_extension(both, critical=False)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # The first certificate is what a process shows, and any of them one that it trusts.
    signed = [each.sign(authority_key, hashes.SHA256()) for each in (theirs, own)]
    return b"".join([*(each.public_bytes(serialization.Encoding.PEM) for each in signed), private])


def _unsigned(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))  # clocks of nodes differ
    return builder.not_valid_after(now + datetime.timedelta(days=365 * _YEARS))


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
