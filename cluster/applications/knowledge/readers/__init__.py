"""Readers of files: the type of a file by name and content, its text and structure.

files    the entry: ``read_file``
detect   type of a file
text     plain text and Markdown, read in the replica
process  a process with limits for all other files; child runs there
pdf, docx

Nothing is imported here, so that the process starts fast.
"""
