-- Returns {rows waiting or leased, {rows, seconds} of the last minute of work,
-- {announcement, workers}..., rows of the owner ARGV[3] or 0}.
sweep()
return {backlog(), {speed()}, announcements(), ARGV[3] and open_rows(ARGV[3]) or 0}
