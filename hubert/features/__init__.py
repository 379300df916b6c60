"""What is clustered: MFCC or a layer of a model, computed for whole files, and the features stage.

May import the packages `core`, `settings`, `data` and `model`.
"""
