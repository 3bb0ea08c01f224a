"""The signature of a bundle: Ed25519 over the bytes of `bundle.json`.

The manifest holds the hash of every other file, so its signature covers the whole bundle. The
signature is checked before the manifest is parsed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from sld_edge.engines.errors import BundleError, MissingPackageError
from sld_edge.engines.files import read_limited

SIGNATURE = "bundle.json.sig"
_BYTES = 64
_DO = "get the bundle from its maker again, or have it signed: sld-export --sign KEY --output DIR"


def signer_text(public: bytes) -> str:
    """Return a public key, 32 bytes, in the form of a policy's list of signers."""
    return f"ed25519:{base64.b64encode(public).decode()}"


def require_signed(root: Path, manifest: bytes, signers: Sequence[str]) -> str:
    """Return the signer of a bundle.

    Args:
        root: the bundle's folder with `bundle.json.sig`.
        manifest: the bytes of `bundle.json`.
        signers: the keys that are accepted, in the form of `signer_text`.

    Raises:
        BundleError: no signature, or a signature by none of the signers.
        MissingPackageError: the package that checks signatures is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise MissingPackageError(
            "cryptography", extra="sign", why="this device's policy of signed bundles"
        ) from error
    signature = read_limited(root / SIGNATURE, _BYTES, error=BundleError, do=_DO)
    for signer in signers:
        try:
            public = base64.b64decode(signer.removeprefix("ed25519:"), validate=True)
            Ed25519PublicKey.from_public_bytes(public).verify(signature, manifest)
        except (binascii.Error, ValueError, InvalidSignature):
            continue
        return signer
    raise BundleError(
        f"{root} is signed by none of the keys that this device's policy names", do=_DO
    )
