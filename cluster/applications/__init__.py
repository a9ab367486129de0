"""Applications: typed tasks, carried out by calls to the cluster's generators and classifiers.

engine     the tasks behind the interface of engines, so that a replica can serve them
app        HTTP: bodies, results, streams, errors, OpenAPI
calls      calls to models on behalf of the sender of a task
prompts    templates of prompts
chunks     division of long texts by tokens, and into sentences
evidence   parts of a text that share the words of a sentence
languages  names and detection of languages
tasks      one module per task
"""
