"""Audio and manifests: reading, listing, checking, splitting, the manifest stage, and the demo corpus.

May import `hubert.core` and `hubert.settings`.
"""
