"""What the command line's commands do, one file each; `app` imports one when it runs."""
