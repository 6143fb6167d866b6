-- {rows waiting or leased, rows and seconds of the last minute of work, {announcement, workers}...,
-- rows of the owner ARGV[3], where given}.
sweep()
return {backlog(), {speed()}, announcements(), ARGV[3] and open_rows(ARGV[3]) or 0}
