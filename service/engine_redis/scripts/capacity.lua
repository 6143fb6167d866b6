-- {rows waiting or leased, rows and seconds of the last minute of work, {announcement, workers}...}
sweep()
return {backlog(), {speed()}, announcements()}
