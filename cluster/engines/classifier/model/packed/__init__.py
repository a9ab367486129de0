"""BERT without padding, on CPUs (``cpu``) and on GPUs (``gpu``).

Imports run ``linear → quantize, network → layout → cpu, gpu``. ``linear`` is the fast part.
"""
