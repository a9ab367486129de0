"""Starting and stopping of the local Ray cluster that ``tandem up`` runs everything in.

Every process of the cluster carries ``TANDEM_CLUSTER_ID`` in its environment; that alone says
what ``down`` ends. Knows nothing of the command line: progress goes to a callback, results are
values, and what cannot be done is a ``StartError``.
"""
