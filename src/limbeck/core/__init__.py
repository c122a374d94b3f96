"""The ground floor: what every other room uses, and what knows nothing of models.

errors.py        LimbeckError, the one exception for users
console.py       messages, tables and progress bars
live.py          what is known of a long piece of work; screen.py draws it on the terminal
config.py        settings from YAML and the command line
recipe.py        recipes of runs and of small teachers; stage_settings.py, text_settings.py and objectives.py are their
                 parts, old_keys.py renames keys of earlier versions
storage.py       files and folders that are complete or absent, locks, full disks
cache.py         cached folders that are filled once and verified
distributed.py   several processes that work on one run; collectives.py sums and copies over them
signals.py       graceful shutdown
system.py        memory and load of the machine
version.py       the version of Limbeck
"""
