"""One format a file, found by listing this folder. A file has

    NAME                             what users call it
    is_here(files) -> bool           sure signs of it, and of no other format
    read(files, k) -> Foreign        `k`: what a user says where no file does, else None

    read_set(files, k)               {name: Foreign}, of formats of several dictionaries; {} where the files are of one

and where we write it

    NEEDS_THRESHOLD                  whether it knows only thresholds, so that a selection of k needs some first
    write(ours, folder)              its files; UsageError, naming what it cannot hold
    write_set([ours], folder)        of formats of several dictionaries
"""
