"""When the certificate of a cluster's own connections expires."""

import ssl

from cluster.link.handshake import TlsContexts


def certificate_expiry(tls: TlsContexts) -> float:
    """Unix time at which the certificate that this process shows expires; 0: it is not valid.

    Asks it of a handshake in memory: nothing in ``ssl`` reads a certificate's file.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls.client.wrap_bio(to_client, to_server)
    server = tls.server.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError:
            return 0.0
    shown = client.getpeercert()
    assert shown is not None
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))
