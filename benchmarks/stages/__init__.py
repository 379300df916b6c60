"""One file per stage; `SIDES` names who can do it: prepare, work in `with run.clock:`, return an Outcome."""
