"""Knowledge bases: documents of a tenant, to search and to answer from.

app         HTTP: requests to paths; forms reads uploads
operations  paths, bodies and results, and their OpenAPI descriptions
ingest      creation of knowledge bases, documents that are added or replaced
search      searches, and answers from what they find
readers     text and structure of files (document), with bounds
passages    division of a document by structure and tokens
encoder     tokens and vectors from the classifier pool
store       databases in LanceDB, one per tenant; table is one knowledge base
"""
