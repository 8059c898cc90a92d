-- RELEASE. ARGV: worker, then rid and attempt of each request that a draining worker hands back. They go to
-- the first lane, for their clients have waited once; handing back counts neither as progress nor against it.
local worker = ARGV[1]
ensure_lane('hi')
for i = 2, #ARGV, 2 do
  local r = req_key(ARGV[i])
  local h = redis.call('HMGET', r, 'attempt', 'worker', 'state', 'lane', 'eid')
  if h[1] == ARGV[i + 1] and h[2] == worker and h[3] == 'running' then
    drop(h[4], h[5])
    local eid = redis.call('XADD', lane_key('hi'), '*', 'rid', ARGV[i])
    redis.call('HSET', r, 'state', 'queued', 'worker', '', 'lane', 'hi', 'eid', eid, 'lastlen', -1)
  end
end
return redis.status_reply('OK')
