-- BEAT. ARGV: worker, ttl_s, status (JSON), then rid and attempt of each running request. Renews the leases
-- that are still ours; returns the rids that are lost: taken over, cancelled, past their deadline, or owned
-- by an API process that has died.
local worker, now, lost = ARGV[1], now_ms(), {}
redis.call('HSET', PREFIX .. 'wk:' .. worker, 'status', ARGV[3], 'at_ms', now)
redis.call('EXPIRE', PREFIX .. 'wk:' .. worker, ARGV[2])
redis.call('ZADD', PREFIX .. 'wks', now, worker)
redis.call('ZREMRANGEBYSCORE', PREFIX .. 'wks', '-inf', now - ARGV[2] * 1000)

local function keep(rid, attempt)
  local h = redis.call('HMGET', req_key(rid), 'attempt', 'worker', 'state', 'lane', 'eid', 'cancel', 'api',
    'deadline_ms')
  if h[1] ~= attempt or h[2] ~= worker or h[3] ~= 'running' then return false end
  local finish, err = verdict(h[6], h[7], h[8], now)
  if finish then
    terminate(rid, finish, err)
    return false
  end
  -- resets the idle time without counting a delivery
  redis.call('XCLAIM', lane_key(h[4]), GROUP, worker, 0, h[5], 'JUSTID')
  return true
end

for i = 4, #ARGV, 2 do
  if not keep(ARGV[i], ARGV[i + 1]) then lost[#lost + 1] = ARGV[i] end
end
return lost
