"""Code for the processes of a cluster under test, which obeys the control file of the tests.

``path`` is put on PYTHONPATH; Python runs its ``sitecustomize`` in every process.
"""
