"""What the dashboard shows, as files of other programs: one format a file, found by listing this folder. A file has

    NAME                                            what users call it
    check(record)                                   UsageError for a dictionary that it has no place for
    write(folder, exported, latents, earlier)       what is shown of latents, one after the other, into a new folder;
                                                    `earlier` is the export of this format that it will replace, or None

Memory does not grow with the number of latents, but for a number of each.
"""
