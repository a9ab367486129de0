"""Certificates for the TLS variables of Ray."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def certificates(folder: Path, *addresses: str) -> dict[str, str]:
    """Create a CA and a certificate; return Ray's TLS variables with their files.

    The certificate is for 127.0.0.1 and ``addresses``.
    """
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test CA")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    hosts = [x509.IPAddress(ipaddress.ip_address(each)) for each in ("127.0.0.1", *addresses)]
    now = datetime.datetime.now(datetime.UTC)

    def build(subject: x509.Name, public: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .sign(ca_key, hashes.SHA256())
        )

    pem = serialization.Encoding.PEM
    files = {
        "RAY_TLS_CA_CERT": build(ca_name, ca_key.public_key(), True).public_bytes(pem),
        "RAY_TLS_SERVER_CERT": build(name, key.public_key(), False).public_bytes(pem),
        "RAY_TLS_SERVER_KEY": key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    folder.mkdir()
    for variable, data in files.items():
        (folder / variable).write_bytes(data)
    return {"RAY_USE_TLS": "1"} | {variable: str(folder / variable) for variable in files}
