"""Knowledge bases: documents of a tenant, to search and to answer from.

app        HTTP: paths, bodies, forms; openapi describes them
base       operations on one knowledge base: add, search, answer
readers    text and structure of files, with bounds
passages   division of a document by structure and tokens
encoder    tokens and vectors from the classifier pool
store      tables in LanceDB, per tenant and name
"""
