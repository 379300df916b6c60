"""What a report shows, gathered from the files of the stages.

May import what `hubert.report` may.
"""
