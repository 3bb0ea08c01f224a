"""Signing a bundle with an Ed25519 key, made with `openssl genpkey -algorithm ed25519`."""

from __future__ import annotations

from pathlib import Path

from sld_edge.engines.errors import InputError, MissingPackageError
from sld_edge.engines.files import JSON_LIMIT, read_limited, write_whole
from sld_edge.export.output import recover
from sld_edge.export.write_bundle import BUNDLE
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.manifest import MANIFEST
from sld_edge.runtime.signatures import SIGNATURE, signer_text

_KEY_LIMIT = 1 << 16


def signing_key(path: Path) -> object:
    """Read a private key, so that a wrong key is refused before any work is done.

    Raises:
        InputError: no Ed25519 key in PEM, or an encrypted key.
        MissingPackageError: the package that signs is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise MissingPackageError("cryptography", extra="sign", why="signing") from error
    data = read_limited(path, _KEY_LIMIT, error=InputError)
    do = "make one with: openssl genpkey -algorithm ed25519 -out KEY.pem"
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise InputError(f"the key {path} is encrypted", do="decrypt it first") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no private key in PEM", do=do) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is no Ed25519 key", got=type(key).__name__.strip("_"), do=do)
    return key


def sign_bundle(root: Path, key: object) -> str:
    """Write the signature of a whole bundle; return its signer as policies name it.

    Args:
        root: the bundle.
        key: from `signing_key`.

    Raises:
        BundleError: no bundle there, or one of its files does not match its manifest.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    assert isinstance(key, Ed25519PrivateKey)
    recover(root.resolve(), BUNDLE)
    bundle = Bundle.open(root)
    for component in bundle.manifest.components.values():
        bundle.graph(component)
    for file in bundle.manifest.files():
        bundle.check(file)
    raw = read_limited(root / MANIFEST, JSON_LIMIT, error=InputError)
    write_whole(root / SIGNATURE, key.sign(raw))
    return signer_text(key.public_key().public_bytes_raw())
