"""Signing requests: what a device sends for a certificate, its public key and proof that it holds the private one."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft.errors import IdentityInvalid
from fedpeft.identity.keys import PrivateKey

PublicKey = ec.EllipticCurvePublicKey

MAX_BYTES = 4096


def make(key: PrivateKey) -> bytes:
    """Returns a request in DER; it names nobody, because the token or the old certificate does."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def read(data: bytes) -> PublicKey:
    """Returns the public key of a request.

    Raises:
        IdentityInvalid: If it is too long, malformed, wrongly signed, or its key is not on P-256.
    """
    if len(data) > MAX_BYTES:
        raise IdentityInvalid(f"the signing request has {len(data)} bytes; at most {MAX_BYTES} are taken")
    try:
        request = x509.load_der_x509_csr(data)
        key, signed = request.public_key(), request.is_signature_valid
    except Exception:  # the parser raises many kinds for hostile input; each means the same
        raise IdentityInvalid("this is not a signing request in DER form") from None
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityInvalid("the key of the signing request is not on the curve P-256")
    if not signed:
        raise IdentityInvalid("the signature of the signing request does not fit its key")
    return key
