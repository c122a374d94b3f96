"""Text in, batches out.

text      the text of a recipe, opened: what the rest of the package calls
sources   documents of a file, a folder, a dataset or the embedded corpus
hub       those of a dataset of the package datasets
tokens    tokens that were made before, as a source
corpus    where the embedded corpus comes from, and its licences
encode    documents to token ids
chat      conversations to token ids, with a mask of the answers
shards    tokenise once into memory-mapped files, split by document
parts     the shards of a large source
streaming tokenise shard by shard, in bounded room
packing   batches as a pure function of one integer position
streamed  the same of a stream
mixture   the same of several sources in given shares
cache     the cache folder, and folders that are either whole or not there
"""
