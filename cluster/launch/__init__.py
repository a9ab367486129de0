"""Start, stop and diagnosis of the local Ray cluster of ``tandem up``.

Every process of the cluster has ``TANDEM_CLUSTER_ID`` in its environment; ``down`` ends exactly
these. The package is independent of the command line: progress goes to a callback, results are
returned, and failures raise ``StartError``.
"""
