"""Manifests that people bring along: what their columns mean, and what would be misunderstood.

| columns | taken as |
|---|---|
| fileid, path, … | this project's own: `offset` and `num_samples` are samples at 16 kHz |
| audio_filepath, duration, offset | NeMo's: seconds; a row that is shorter than its file is a segment of it |
| file_name | Hugging Face's metadata of an audio folder: whole files |
| a folder, then `path<TAB>num_samples` | fairseq's .tsv; also `x.zip:byte_offset:byte_size`, `x.wav:offset:num_samples` |

Other columns that would make a row a part of its file (start, end) are refused: to leave them out would use 15 s where
1.5 s were asked for. A `duration`, in seconds, must be the file's. The rest (text, language) is left out.
"""
