"""What audio files are made of: the sizes that containers declare, the frames that codecs count, other sample rates.

libsndfile decodes; it mends some damage in silence, and estimates some lengths. The modules here read the bytes
themselves, so that what it would not say is found before a file is accepted. They import `hubert.core` alone.
"""
