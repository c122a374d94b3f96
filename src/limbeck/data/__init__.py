"""Text in, batches out.

sources   documents of a file, a folder, a dataset or the embedded corpus
corpus    where the embedded corpus comes from, and its licences
shards    tokenise once into memory-mapped files, split by document
packing   batches as a pure function of one integer position
cache     the cache folder, and folders that are either whole or not there
"""
